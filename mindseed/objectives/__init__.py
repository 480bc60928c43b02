"""One file per algorithm. A new one is a file here, and a branch of recipes/methods.py or a row of
recipes/rl_options.py."""
