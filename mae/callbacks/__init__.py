"""Callbacks, in the order in which they run after a step.

1 throughput       measures and logs: loss, learning rate, images per second
2 progress         prints
3 the task's own   reconstructions, online_probe
4 save_checkpoints saves
5 skip_non_finite  reports skipped steps, ends the run after too many
6 stop_on_signal   ends the run

`trainer.max_time` puts time_limit before them, `profile=true` the profiler; share_lease acts at the start only,
hang_watch in threads.
tasks/train.py builds the list: a step is logged, painted and saved before the run may end at it.
"""
