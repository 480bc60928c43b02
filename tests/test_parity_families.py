"""Every family, both ways: a random model of transformers and ours agree in logits, in every gradient, in the experts
they choose; and what was read and written again is the same to the byte. YaRN and its kin against their frequencies.
"""
from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from mindseed.interop.directory import load_directory, save_directory
from mindseed.models.presets import preset
from mindseed.nn.attend import Layout
from mindseed.nn.balance import balance_per_token
from mindseed.nn.linear_attention import chunked
from mindseed.nn.moe import MoE
from mindseed.nn.rope import RopeConfig, frequencies
from mindseed.interop.rope_json import rope_from_json
from mindseed.tokenizers.byte import Byte
from mindseed.tokenizers.hf_json import save_tokenizer
from tests.tiny import randomise

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
pytestmark = pytest.mark.parity

VOCAB = 331
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 3e4},
    "linear": {"rope_type": "linear", "rope_theta": 3e4, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 3e4, "factor": 2.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 3e4, "factor": 4.0, "original_max_position_embeddings": 24},
    "yarn, told": {"rope_type": "yarn", "rope_theta": 1e3, "factor": 8.0, "original_max_position_embeddings": 24,
                   "beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
    "llama3": {"rope_type": "llama3", "rope_theta": 3e4, "factor": 8.0, "original_max_position_embeddings": 24,
               "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
COMMON = dict(vocab_size=VOCAB, hidden_size=40, num_hidden_layers=3, num_attention_heads=4, rms_norm_eps=1e-5,
              max_position_embeddings=96, bos_token_id=1, eos_token_id=2, pad_token_id=0)
DENSE = COMMON | dict(intermediate_size=72, num_key_value_heads=2)
QWEN3_MOE = DENSE | dict(head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
DEEPSEEK = COMMON | dict(
    intermediate_size=72, num_key_value_heads=4, moe_intermediate_size=20, n_routed_experts=8, n_shared_experts=2,
    num_experts_per_tok=3, n_group=4, topk_group=2, first_k_dense_replace=1, routed_scaling_factor=2.5, q_lora_rank=14,
    kv_lora_rank=18, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=7)
CASES = {
    **{f"llama, {name}": ("Llama", DENSE | {"rope_parameters": rope}) for name, rope in ROPES.items()},
    "llama, head_dim, tied": ("Llama", DENSE | {"head_dim": 6, "tie_word_embeddings": True}),
    "qwen3, yarn": ("Qwen3", DENSE | {"head_dim": 16, "rope_parameters": ROPES["yarn"]}),
    "qwen3, windows": ("Qwen3", DENSE | {"head_dim": 16, "use_sliding_window": True, "sliding_window": 5,
                                         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "qwen3_moe": ("Qwen3Moe", QWEN3_MOE | {"norm_topk_prob": True}),
    "qwen3_moe, raw weights, dense layer": ("Qwen3Moe", QWEN3_MOE | {"norm_topk_prob": False, "mlp_only_layers": [1]}),
    "qwen3_moe, every second layer": ("Qwen3Moe", QWEN3_MOE | {"decoder_sparse_step": 2, "norm_topk_prob": True}),
    "qwen3_moe, top-1": ("Qwen3Moe", QWEN3_MOE | {"num_experts_per_tok": 1, "norm_topk_prob": False}),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK),
    "deepseek_v3, no q compression": ("DeepseekV3", DEEPSEEK | {"q_lora_rank": None, "norm_topk_prob": False}),
    "deepseek_v3, half-split": ("DeepseekV3", DEEPSEEK | {"rope_interleave": False}),
    "deepseek_v3, one group": ("DeepseekV3", DEEPSEEK | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}),
    "deepseek_v3, yarn": ("DeepseekV3", DEEPSEEK | {"rope_parameters": ROPES["yarn"] | {
        "mscale": 1.0, "mscale_all_dim": 0.8}}),
}


def make(family: str, settings: dict, seed: int = 0):
    """A model of theirs with every parameter random, buffers that steer routers too."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    randomise(model, seed)
    for name, buffer in model.named_buffers():
        if "e_score_correction_bias" in name:
            buffer.uniform_(-0.2, 0.2)
    return model


def save(model, folder):
    model.save_pretrained(folder)
    save_tokenizer(Byte(), folder)
    return folder


def ids_for(length: int = 31, rows: int = 2):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(7))


def our_logits(model, ids):
    return model(ids, torch.arange(ids.shape[1]).expand_as(ids)).logits()


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def theirs(request):
    return make(*request.param)


def test_logits_and_every_gradient(theirs, tmp_path):
    ours = load_directory(save(theirs, tmp_path / "m")).model
    ids = ids_for()
    got, want = our_logits(ours, ids), theirs(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    pull = torch.randn(got.shape, generator=torch.Generator().manual_seed(3))
    (got * pull).sum().backward()
    (want * pull).sum().backward()
    gradients = copy.deepcopy(theirs)                         # a model made of gradients is read by the same rules
    with torch.no_grad():
        for p, g in zip(gradients.parameters(), theirs.parameters()):
            p.copy_(g.grad)
    wanted = load_directory(save(gradients, tmp_path / "g")).model
    for (name, p), g in zip(ours.named_parameters(), wanted.parameters(), strict=True):
        scale = g.detach().abs().max()
        assert scale > 0, f"{name} has no gradient"
        torch.testing.assert_close(p.grad / scale, g.detach() / scale, rtol=0, atol=1e-4, msg=lambda m: f"{name}: {m}")


def test_there_and_back_is_the_same_to_the_byte(theirs, tmp_path):
    loaded = load_directory(save(theirs, tmp_path / "a"))
    folder = save_directory(loaded.model, loaded.tokenizer, tmp_path / "b", family=loaded.family)
    a, b = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert {k: v.dtype for k, v in a.items()} == {k: v.dtype for k, v in b.items()}
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert json.loads((folder / "config.json").read_text())["model_type"] == theirs.config.model_type
    again, report = type(theirs).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    ids = ids_for()
    torch.testing.assert_close(again.eval()(ids).logits, theirs(ids).logits, rtol=0, atol=0)
    (folder / "mindseed.json").unlink()
    assert load_directory(folder).model.config == loaded.model.config


@pytest.mark.parametrize("name", [name for name in CASES if "moe" in name or "deepseek" in name])
def test_the_same_experts_are_chosen(name, tmp_path):
    theirs = make(*CASES[name])
    ours = load_directory(save(theirs, tmp_path / "m")).model
    chosen_here, chosen_there, weights = [], [], []
    for module in ours.modules():
        if isinstance(module, MoE):
            route = module.route
            module.route = lambda logits, route=route: (chosen_here.append(route(logits)), chosen_here[-1])[1]
    for module in theirs.modules():
        if type(module).__name__.endswith(("TopkRouter", "TopKRouter")):
            module.register_forward_hook(lambda m, i, out: chosen_there.append(out))
    ids = ids_for()
    our_logits(ours, ids), theirs(ids)
    assert len(chosen_here) == len(chosen_there) > 0
    for (weights, chosen, _), (_, their_weights, their_chosen) in zip(chosen_here, chosen_there):
        order, their_order = chosen.argsort(-1), their_chosen.argsort(-1)
        assert torch.equal(chosen.gather(-1, order), their_chosen.gather(-1, their_order))
        torch.testing.assert_close(weights.gather(-1, order), their_weights.gather(-1, their_order), rtol=1e-5,
                                   atol=1e-6)


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("length", [20, 96, 300])
def test_frequencies(name, length):
    config = transformers.LlamaConfig(**DENSE | {"head_dim": 20, "rope_parameters": dict(ROPES[name])})
    rope = rope_from_json({"rope_parameters": ROPES[name], "max_position_embeddings": 96}, "here")
    ours, factor = frequencies(rope, 20, length)
    if name == "default":
        want, want_factor = 3e4 ** (-torch.arange(0, 20, 2) / 20), 1.0
    else:
        init = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[ROPES[name]["rope_type"]]
        want, want_factor = init(config, "cpu", seq_len=length)
    torch.testing.assert_close(ours.float(), want.float(), rtol=1e-6, atol=0)
    assert factor == pytest.approx(want_factor)


def test_the_balance_loss_is_theirs():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2 * 9, 6, generator=g, requires_grad=True)
    shares = logits.softmax(-1)
    chosen = shares.topk(2, dim=-1).indices
    busy = torch.zeros(6).scatter_add_(0, chosen.flatten(), torch.ones(36)) / 36
    ours = balance_per_token(shares.view(2, 9, 6), busy).mean()
    want = load_balancing_loss_func((logits,), 6, 2) / 2                          # theirs counts every choice as one
    torch.testing.assert_close(ours, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, want)))


def test_the_delta_rule_is_theirs():
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 100, 3, n, generator=g, requires_grad=True) for n in (8, 8, 6))
    log_a, b = -torch.rand(2, 100, 3, generator=g) * 2, torch.rand(2, 100, 3, generator=g)
    memory = torch.randn(2, 3, 8, 6, generator=g)
    positions = torch.arange(5, 105).expand(2, -1)
    qn, kn = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    got, after = chunked(qn * 8 ** -0.5, kn, v, log_a, b, positions, memory)
    want, their_after = torch_chunk_gated_delta_rule(q, k, v, log_a, b, initial_state=memory, output_final_state=True,
                                                     use_qk_l2norm_in_kernel=True)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after, their_after, rtol=1e-4, atol=1e-5)
    pull = torch.randn(got.shape, generator=g)
    grads = [torch.autograd.grad((x * pull).sum(), (q, k, v), retain_graph=True) for x in (got, want)]
    for a, c in zip(*grads):
        torch.testing.assert_close(a, c, rtol=1e-3, atol=1e-4)


def test_multi_token_prediction_is_theirs(tmp_path, monkeypatch):
    shape = preset("deepseek-v3-toy")
    shape = replace(shape, layers=2, dim=32, heads=2, kv_heads=2, head_dim=8, ffn_dim=48, mtp=2,
                    moe=replace(shape.moe, expert_dim=12, shared_dim=12),
                    latent=replace(shape.latent, kv_rank=10, q_rank=12, rope_dim=4))
    from mindseed.models.lm import build
    ours = build(shape.lm_config(vocab_size=VOCAB, seq_len=64))
    randomise(ours)
    folder = save_directory(ours, Byte(), tmp_path / "m")
    monkeypatch.setattr(transformers.DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected",
                        [r"model\.layers\.[23].*"])                  # theirs knows the layer of the one published model
    main = transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ahead = transformers.modeling_layers.MtpModel.from_pretrained(main).eval()
    ids = ids_for(12)
    ours.train()
    output = ours(ids, torch.arange(12).expand(2, -1))
    hidden = main.model(ids).last_hidden_state
    torch.testing.assert_close(output.hidden, hidden, rtol=1e-5, atol=1e-5)
    mask = torch.full((12, 12), float("-inf")).triu(1)[None, None]
    for distance, (layer, got) in enumerate(zip(ahead.layers, output.further), start=1):
        shifted = torch.cat([ids[:, distance:], ids[:, -1:].expand(-1, distance)], 1)
        positions = torch.arange(12)[None]
        hidden = layer(main.model.embed_tokens(shifted), hidden, main.model.rotary_emb(hidden, positions), mask,
                       positions, None)
        torch.testing.assert_close(got, hidden, rtol=1e-5, atol=1e-5)


def test_a_layout_with_dynamic_scaling_follows_the_text():
    rope = RopeConfig(scaling=rope_from_json({"rope_parameters": ROPES["dynamic"], "max_position_embeddings": 8},
                                             "here").scaling)
    tables = []
    for length in (8, 30):
        layout = Layout(torch.arange(length)[None])
        layout.add_rotary(rope, 8, torch.float64)
        tables.append(layout.rotary[rope, 8][0][0, 5])
    assert (tables[0] - tables[1]).abs().max() > 1e-3
