"""The contracts of a loss, a method, a strategy and a callback, and the registries of names."""
