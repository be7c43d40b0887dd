"""The engine: requests come at any time, passes serve all of them, updates go out. Ids alone."""
