"""UniPi, the baseline that plans in pixels, as a LeRobot policy."""
