"""Trains the reward model alone, in WORKDIR/reward, from the policy in WORKDIR/sft.

python experiments/reward_summarize.py --config=configs/ppo_summarize.py --workdir=runs/demo
"""

from launch import launch

if __name__ == "__main__":
    launch(task="summarize", only="reward")
