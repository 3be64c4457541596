"""The operations in plain torch: the specification, the tests' yardstick, and the last resort."""
