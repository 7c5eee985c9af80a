"""Reinforcement learning on your own prompts, with your own reward function, from random or pretrained weights.

python experiments/rl.py --config=configs/rl.py --workdir=runs/mine \
    --config.data.prompts=prompts.jsonl --config.reward=my_reward.py:score
"""

from launch import launch

if __name__ == "__main__":
    launch(task="prompts")
