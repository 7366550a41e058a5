"""Made from splitlearn.proto by `make proto`; never edited by hand."""
