"""Model optimisation: training, ReLU reduction and compilation to the model file that the protocol runs."""
