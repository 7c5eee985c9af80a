"""Compares policy gradient, importance weights and PPO's clip on identical rollouts, used 1, 2, 4 and 8 times.

python experiments/reuse_rollouts.py --config=configs/pg_tweets.py --workdir=runs/tweets --config.seeds=16

The workdir must have finished pretrain and sft stages (experiments/pg_tweets.py). seeds is the number of rollouts.
"""

from launch import launch

from rlhf_jax.commands.reuse import reuse

if __name__ == "__main__":
    launch(task="write", job=reuse)
