"""Many variants of one recipe, or many customers, trained in one pass over one base."""
