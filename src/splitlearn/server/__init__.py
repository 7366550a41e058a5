"""The trunk's side of the wire: streams in, engine steps out; no client code is reachable from here."""
