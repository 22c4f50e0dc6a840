"""When a rewrite is allowed. `verify` lists the rules, one function each, named as the sentence that it proves."""
