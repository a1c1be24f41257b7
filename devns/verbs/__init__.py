"""One file a verb, a plain function each: it names the stages in order and nothing more."""
