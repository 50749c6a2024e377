"""Every schedule beside its paper's formula, written again in float64 NumPy: (alpha, sigma) at t in (0, 1).

An oracle shares no code with the package: these are the formulas as printed, without care for precision.
"""

import numpy as np

import jaxdiff as jd


def _vp(beta_min, beta_max):
    def formula(t):
        log_alpha = -(t**2) * (beta_max - beta_min) / 4 - t * beta_min / 2
        return np.exp(log_alpha), np.sqrt(1 - np.exp(2 * log_alpha))

    return formula


def _sub_vp(t):
    log_alpha = -(t**2) * (20 - 0.1) / 4 - t * 0.1 / 2
    return np.exp(log_alpha), 1 - np.exp(2 * log_alpha)


def _cosine(t, s=0.008):
    alpha_bar = np.cos((t + s) / (1 + s) * np.pi / 2) ** 2 / np.cos(s / (1 + s) * np.pi / 2) ** 2
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def _sigmoid(t, start=-3, end=3, tau=1.0):
    def f(u):
        return 1 / (1 + np.exp(-u / tau))

    alpha_bar = (f(end) - f(t * (end - start) + start)) / (f(end) - f(start))
    return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)


def _edm(t, low=0.002, high=80.0, rho=7):
    # eq. 5 of the paper from sigma_max + sigma_min to sigma_min, less sigma_min
    sigma = ((high + low) ** (1 / rho) + (1 - t) * (low ** (1 / rho) - (high + low) ** (1 / rho))) ** rho - low
    return np.ones_like(t), sigma


def _ve(t):
    return np.ones_like(t), 0.01 * (50 / 0.01) ** t


def _shifted_cosine(t, offset=-2.0):
    # simple diffusion, section 3.1: logsnr + offset, alpha^2 = sigmoid(logsnr)
    alpha, sigma = _cosine(t)
    logsnr = np.log(alpha**2 / sigma**2) + offset
    return np.sqrt(1 / (1 + np.exp(-logsnr))), np.sqrt(1 / (1 + np.exp(logsnr)))


def _sd3(t, s=3.0):
    t = s * t / (1 + (s - 1) * t)
    return 1 - t, t


CONTINUOUS = {
    "linear": (jd.schedule.linear(), _vp(0.1, 20)),
    "vp": (jd.schedule.vp(beta_min=0.2, beta_max=15), _vp(0.2, 15)),
    "sub_vp": (jd.schedule.sub_vp(), _sub_vp),
    "ve": (jd.schedule.ve(), _ve),
    "edm": (jd.schedule.edm(), _edm),
    "cosine": (jd.schedule.cosine(), _cosine),
    "sigmoid": (jd.schedule.sigmoid(), _sigmoid),
    "rectified_flow": (jd.schedule.rectified_flow(), lambda t: (1 - t, t)),
    "shift_logsnr": (jd.schedule.shift(jd.schedule.cosine(), logsnr=-2.0), _shifted_cosine),
    "shift_time": (jd.schedule.shift(jd.schedule.rectified_flow(), time=3.0), _sd3),
}
"""name -> (schedule, formula)."""

TABLES = {
    "ddpm_table": (jd.schedule.ddpm_table(), np.linspace(1e-4, 0.02, 1000)),
    "scaled_linear": (jd.schedule.scaled_linear(), np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
    "from_betas": (jd.schedule.from_betas([0.1, 0.2, 0.5, 0.9]), np.array([0.1, 0.2, 0.5, 0.9])),
}
"""name -> (schedule, betas)."""

ALL = {name: schedule for name, (schedule, _) in (CONTINUOUS | TABLES).items()} | {
    "zero_terminal_snr": jd.schedule.zero_terminal_snr(jd.schedule.scaled_linear()),
    "shifted_sub_vp": jd.schedule.shift(jd.schedule.sub_vp(), logsnr=1.0),
    "shifted_table": jd.schedule.shift(jd.schedule.ddpm_table(), logsnr=-1.0),
}
"""name -> schedule, all of them."""
