"""The competitors: how each operation is computed today, each written as well as plain torch allows."""
