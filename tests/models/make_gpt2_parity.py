"""Makes tests/models/gpt2_parity/ with PyTorch and transformers, so that the tests need neither.

    python3.11 -m venv parity && parity/bin/pip install torch==2.13.0 transformers==5.23.0
    parity/bin/python tests/models/make_gpt2_parity.py

A tiny GPT-2 with random weights (seed 0) goes to model.safetensors and config.json, as transformers saves them;
what transformers computes with it goes to expected.npz. It computes in float64 (its loss alone rounds the logits to
float32), so that the rounding the tests measure is ours, and stores float32. Running this again writes the same bytes.
make_neox_parity.py does the same for GPT-NeoX, with the functions of this file.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

FOLDER = Path(__file__).with_name("gpt2_parity")
LENGTHS = [16, 11, 5, 2]  # real tokens a row, at the right end of 16 columns
NEW_TOKENS = 12
VOCABULARY = 97
PAD = 0  # of the scored rows, which are padded on the right
OF_BOTH = dict(vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None)


def tiny_gpt2():
    """Two layers of width 24 with weights ten times the usual size, so that logits spread and greedy ids differ."""
    config = GPT2Config(**OF_BOTH, n_positions=32, n_embd=24, n_layer=2, n_head=3, attn_implementation="eager")
    return spread(GPT2LMHeadModel(config))


def spread(model, seed=0):
    """The model with other random weights, and without dropout."""
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        # Gains and biases are random, too: with all at 1 and 0 a test could not see them swapped or lost.
        centre = 1.0 if (".ln_" in name or "norm" in name) and name.endswith("weight") else 0.0
        parameter.data = centre + 0.2 * torch.randn(parameter.shape, generator=random)
    return model.eval()


def batch():
    """(tokens, mask, positions), each [B, T]. Padding on the left holds random tokens: nothing may read them."""
    width = max(LENGTHS)
    tokens_BT = torch.randint(VOCABULARY, (len(LENGTHS), width), generator=torch.Generator().manual_seed(1))
    mask_BT = (torch.arange(width) >= width - torch.tensor(LENGTHS)[:, None]).long()
    return tokens_BT, mask_BT, (mask_BT.cumsum(1) - 1).clamp(min=0)


def expected(model):
    """Everything the tests compare, by name; gradients under "gradient/" and the parameter's safetensors name."""
    tokens_BT, mask_BT, positions_BT = batch()
    is_first_BT = mask_BT.bool() & (mask_BT.cumsum(1) == 1)  # no real token before it predicts it
    labels_BT = tokens_BT.masked_fill(is_first_BT | (mask_BT == 0), -100)  # -100: left out of the loss
    inputs = dict(attention_mask=mask_BT, position_ids=positions_BT)
    out = model(tokens_BT, **inputs, labels=labels_BT, output_hidden_states=True)
    out.loss.backward()
    answers = {
        "tokens_BT": tokens_BT,
        "mask_BT": mask_BT,
        "positions_BT": positions_BT,
        "logits_BTV": out.logits,
        "hidden_BTD": out.hidden_states[-1],  # after the final layer norm
        "loss": out.loss,  # cross-entropy in nats, mean over every real token that has a real token before it
        "greedy_BR": greedy(model, tokens_BT, mask_BT),
    }
    # transformers 5 calls GPT-NeoX's head lm_head in memory and embed_out in files.
    name_of = {"lm_head.weight": "embed_out.weight"} if model.config.model_type == "gpt_neox" else {}
    gradients = {f"gradient/{name_of.get(name, name)}": p.grad for name, p in model.named_parameters()}
    return {name: to_numpy(x) for name, x in (answers | gradients | scored(model, tokens_BT)).items()}


def scored(model, tokens_BT):
    """A reward model on the same trunk, read at the last token that is not PAD: its weight, rows, their scores."""
    model.config.num_labels, model.config.pad_token_id = 1, PAD
    reward = AutoModelForSequenceClassification.from_config(model.config).eval().to(model.dtype)
    reward.base_model.load_state_dict(model.base_model.state_dict())
    weight = reward.score.weight
    weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).to(weight.dtype)
    columns = torch.arange(tokens_BT.shape[1])
    real_BT = columns < torch.tensor(LENGTHS)[:, None]
    rows_BT = torch.where(real_BT, tokens_BT.clamp(min=1), PAD)
    scores_B = reward(rows_BT, attention_mask=real_BT.long()).logits[:, 0]
    return {"score.weight": weight, "scored_BT": rows_BT, "score_B": scores_B}


def greedy(model, tokens_BT, mask_BT):
    """The most likely continuation. Its margins are checked: a near tie would test rounding, not the model."""
    out = model.generate(
        tokens_BT,
        attention_mask=mask_BT,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best_two = torch.stack(out.logits).topk(2).values
    assert (best_two[..., 0] - best_two[..., 1]).min() > 1e-2
    return out.sequences[:, tokens_BT.shape[1] :]


def to_numpy(x):
    """Whole numbers as int32, the rest as float32."""
    return x.detach().numpy().astype(np.float32 if x.is_floating_point() else np.int32)


def write(model, folder):
    """The model as transformers saves it, and what is expected of it."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    np.savez(folder / "expected.npz", **expected(model.double()))


if __name__ == "__main__":
    write(tiny_gpt2(), FOLDER)
