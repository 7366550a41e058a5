"""What crosses the wire, and how it is written down and checked."""
