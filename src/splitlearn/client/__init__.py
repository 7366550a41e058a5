"""The data owner's side: the library's own model with one remote layer; no server code is reachable from here."""
