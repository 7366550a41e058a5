"""How much a trunk does: a load on it, texts from it by several clients at once, and figures of both."""
