"""Reinforcement learning on questions with right answers: short fine-tuning, then any algorithm. Minutes on a CPU.

python experiments/rl_arithmetic.py --config=configs/rl_arithmetic.py:add --workdir=runs/add
"""

from launch import launch

if __name__ == "__main__":
    launch(task="arithmetic")
