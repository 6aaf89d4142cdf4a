"""One call on a GPU: smoke, tests and figures within a bound of seconds."""
