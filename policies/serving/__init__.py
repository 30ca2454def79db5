"""A policy on a robot: the safety layer, the server that computes actions, and the thin client beside the robot."""
