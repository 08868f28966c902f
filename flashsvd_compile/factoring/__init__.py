"""Dense weights of a model in inference → planned factors that live with the compiled graph."""
