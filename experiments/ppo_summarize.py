"""The main job: fine-tuning, reward model and PPO. Finished stages of the workdir are skipped.

python experiments/ppo_summarize.py --config=configs/ppo_summarize.py --workdir=runs/demo
"""

from launch import launch

if __name__ == "__main__":
    launch(task="summarize")
