"""What tests stand on, ours and our users': tiny models of every family."""
