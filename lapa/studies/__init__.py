"""Controlled experiments on the parts of the model zoo: `lapa study study=<name>`, one file a study."""
