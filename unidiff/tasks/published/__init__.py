"""Published data sets as tasks, with the rewards that papers train on them with. Each takes files in the place of the
data set (`--task.train gsm8k.jsonl --task.test …`); without any, the hub's is loaded (extra `data`)."""
