"""Workers of the benchmarks, one module a library: each runs in the environment that holds its library."""
