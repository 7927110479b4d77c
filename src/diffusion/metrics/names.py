"""What a number is called: measure, feature space, and how many samples it is of."""

K = 1024  # below 10,000 samples; from there on 1,000, as published names have it
INCEPTION = {"frechet": "fid", "kid": "kid", "infinity": "fid_inf"}
OTHERS = {"frechet": "fd", "kid": "kd", "infinity": "fd_inf"}  # never FID or KID: those are Inception's


def metric_name(
    measure: str,  # frechet | kid | infinity | precision | recall | copies
    extractor: str,  # its `metric`: fid | fd_lite0 ...
    samples: int,
    split: str,  # of the reference: train | test
    *,
    precision: str = "fp32",  # of the extractor
    blocks: int = 1,  # of `samples` images each
) -> str:
    """fid50k_train, kid2k_train, precision_inception_2k_train; fd_lite0_2k, kd_lite0_2k; fid3x50k_train of blocks.

    Inception's numbers carry the reference split, as papers quote them. Features in bf16 end the name in _bf16.
    """
    count = f"{blocks}x{short(samples)}" if blocks > 1 else short(samples)
    if extractor == "fid":
        name = f"{INCEPTION.get(measure, f'{measure}_inception_')}{count}_{split}"
    else:
        name = f"{OTHERS.get(measure, measure)}_{extractor.removeprefix('fd_')}_{count}"
    return name if precision == "fp32" else f"{name}_{precision}"


def short(count: int) -> str:
    """2048 -> 2k, 50000 -> 50k, 512 -> 512, 2000 -> 2000: different counts have different texts.

    k is 1,024 below 10,000 and 1,000 from there on; a count that is no whole number of them is written out.
    """
    k = 1000 if count >= 10_000 else K
    return f"{count // k}k" if count % k == 0 and count else str(count)


def shown(value: float) -> str:
    """A distance with two decimals; what is below 1 (KID, shares) with three digits."""
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"
