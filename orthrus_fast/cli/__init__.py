"""The command ``orthrus``: one module a command, and what they share."""
