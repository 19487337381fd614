"""Published data sets as tasks, with the rewards that papers use. Each task can read files
(`--task.train gsm8k.jsonl --task.test …`); without files it loads the data set from the hub (extra `data`)."""
