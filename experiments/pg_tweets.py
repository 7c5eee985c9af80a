"""Happy tweets: pretraining, fine-tuning and policy gradient, without what the workdir has already.

python experiments/pg_tweets.py --config=configs/pg_tweets.py --workdir=runs/tweets
"""

from launch import launch

from rlhf_jax import stages
from rlhf_jax.run import Writing

if __name__ == "__main__":
    launch(stages.write, Writing)
