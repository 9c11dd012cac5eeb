"""Edge scores against the reference implementation's, on tiny models: tests/oracle, and --oracle DIR."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import byte_tokenizer

from steerutils import Batch, wrap_model
from steerutils.attribution import EAP, attribute, left, logit_difference, token_contrast
from steerutils.circuits import patch_edges
from steerutils.graph import fold
from steerutils.models import ungrouped
from steerutils.ranking import layer_scores

HERE = Path(__file__).parent / "oracle"
TOLERANCE = {torch.float32: 5e-5, torch.float64: 1e-5}


def pytest_generate_tests(metafunc):
    folders = [HERE, *([Path(given)] if (given := metafunc.config.getoption("--oracle")) else [])]
    found = [path.parent for folder in folders for path in sorted(folder.rglob("scores.npz"))]
    assert found, f"no oracle cases under {folders}"
    metafunc.parametrize("case", found, ids=[path.name for path in found], scope="module")


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "double"])
def loaded(case, request):
    hf = transformers.AutoModelForCausalLM.from_pretrained(case, dtype=torch.float32, attn_implementation="eager")
    model = wrap_model(hf.to(request.param), byte_tokenizer(), name=case.name, revision="oracle")
    arrays = dict(np.load(case / "scores.npz", allow_pickle=False))
    return model, arrays, TOLERANCE[request.param]


def contrast_of(model, arrays):
    sides = [torch.tensor(arrays[f"{side}_tokens"]) for side in ("clean", "corrupted")]
    sides = [Batch(ids, torch.ones_like(ids), ids.shape[1]) for ids in sides]
    return token_contrast(model, *sides), logit_difference(*torch.tensor(arrays["answers"]).T)


def expected(arrays, method, kind, folded):
    """The reference's array; for post-norm models the one that has the post-norm's Jacobian."""
    ending = f"{kind}_folded" if folded and f"{method}_{kind}_folded" in arrays else kind
    return arrays.get(f"{method}_postnorm_{ending}", arrays.get(f"{method}_{ending}"))


@pytest.mark.parametrize("method, points", [("eap", EAP), ("ig5", left(5)), ("ig20", left(20))])
@pytest.mark.parametrize("folded", [True, False], ids=["folded", "ungrouped"])
def test_scores_match_the_reference(loaded, method, points, folded):
    model, arrays, tolerance = loaded
    native, groups = model, model.n_groups
    model = model if folded else ungrouped(model)
    found = attribute(model, *contrast_of(model, arrays), points)
    values = {
        "per_example": found.values,
        "sum": found.values.sum(0),
        "abs": np.abs(found.values).sum(0),
    }
    for kind, scores in values.items():
        np.testing.assert_allclose(scores, expected(arrays, method, kind, folded), atol=tolerance, rtol=0)
    if not folded:  # the sum over the copies of a shared key or value is the grouped score
        grouped = attribute(native, *contrast_of(native, arrays), points).values
        np.testing.assert_allclose(fold(found.values, found.graph, groups), grouped, atol=tolerance, rtol=0)


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "ungrouped"])
def test_layer_scores_match_the_reference(loaded, folded):
    model, arrays, tolerance = loaded
    model = model if folded else ungrouped(model)
    scores = attribute(model, *contrast_of(model, arrays), left(5))
    table = layer_scores(scores.graph, np.abs(scores.values).sum(0))
    for name in ("in", "out", "total", "ratio"):
        known = [f"layer_{name}{middle}{'_folded' if folded else ''}" for middle in ("_postnorm", "")]
        known = next((arrays[key] for key in [*known, f"layer_{name}"] if key in arrays), None)
        # In and Out are sums of up to 200 absolute scores whose roundings have both signs, so that they keep the
        # tolerance of one score; Total is the sum of two of them
        atol = 2 * tolerance if name == "total" else tolerance
        np.testing.assert_allclose(table[name], known, atol=atol, rtol=0)


@pytest.mark.parametrize("folded", [True, False], ids=["folded", "ungrouped"])
def test_exact_patching_matches_the_reference(loaded, folded):
    model, arrays, tolerance = loaded
    model = model if folded else ungrouped(model)
    contrast, metric = contrast_of(model, arrays)
    edges = np.argwhere(contrast.graph.edges)
    key = "exact_per_example_folded" if folded and "exact_per_example_folded" in arrays else "exact_per_example"
    effects = patch_edges(model, contrast, metric, edges)
    np.testing.assert_allclose(effects.T, arrays[key][:, edges[:, 0], edges[:, 1]], atol=tolerance, rtol=0)


def test_names_match_the_reference(loaded):
    model, arrays, _ = loaded
    graph = contrast_of(model, arrays)[0].graph
    assert graph.source_names == arrays["source_names"].tolist()
    assert graph.reader_names == arrays.get("reader_names_folded", arrays["reader_names"]).tolist()
    np.testing.assert_array_equal(graph.edges, arrays.get("edge_mask_folded", arrays["edge_mask"]))
