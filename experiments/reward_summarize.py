"""The reward model alone: WORKDIR/reward, from the policy in WORKDIR/sft.

python experiments/reward_summarize.py --config=configs/ppo_summarize.py --workdir=runs/demo
"""

from launch import launch

from rlhf_jax import stages
from rlhf_jax.run import Summarization

if __name__ == "__main__":
    launch(stages.reward, Summarization)
