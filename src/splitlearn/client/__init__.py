"""The data owner's side: the library's own model with one remote layer; it knows no server code."""
