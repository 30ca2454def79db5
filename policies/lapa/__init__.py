"""LAPA as a first-class LeRobot policy."""
