"""How the checkpoint in `model/` was made: data, network, training, export, evaluation."""
