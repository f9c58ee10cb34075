"""What a number is called: after the network that it looks through, with what is wrong with it.

"FID", "KID", "IS", "CMMD" and "FVD" are the published protocols and belong to their networks. The
same formula on another network is another number, so it has another name.
"""

from __future__ import annotations

INCEPTION = "Inception"
I3D = "I3D"
CMMD_VARIANT = "ViT-L/14-336"
"""The CLIP of Jayasumana et al. 2024."""


def frechet(network: str) -> str:
    """The Fréchet distance on the features of a network.

    Example:
        >>> frechet("Inception"), frechet("EffNetLite0")
        ('FID', 'FD-EffNetLite0')
    """
    return "FID" if network == INCEPTION else f"FD-{network}"


def kernel(network: str) -> str:
    """The kernel distance (unbiased polynomial MMD) on the features of a network.

    Example:
        >>> kernel("Inception"), kernel("EffNetLite0")
        ('KID', 'KD-EffNetLite0')
    """
    return "KID" if network == INCEPTION else f"KD-{network}"


def cmmd(variant: str) -> str:
    """The Gaussian MMD on the embeddings of one CLIP.

    Example:
        >>> cmmd("ViT-L/14-336"), cmmd("ViT-B/32-224")
        ('CMMD', 'CMMD-ViT-B/32-224')
    """
    return "CMMD" if variant == CMMD_VARIANT else f"CMMD-{variant}"


def cmmd_flag(variant: str, weights: str) -> str | None:
    """What to say of a CMMD by its published name, or None.

    A fine-tuned CLIP has the shape of OpenAI's: only who has the file knows whose weights it holds.

    Example:
        >>> cmmd_flag("ViT-L/14-336", "0123456789abcdef")
        'CLIP weights 01234567, taken for those of OpenAI'
    """
    if variant != CMMD_VARIANT:
        return None
    return f"CLIP weights {weights[:8]}, taken for those of OpenAI"


def clip_score(variant: str) -> str:
    """The CLIP score, which no publication ties to one CLIP: so its name always says which.

    Example:
        >>> clip_score("ViT-B/32-224")
        'CLIP-ViT-B/32-224'
    """
    return f"CLIP-{variant}"


def video_frechet(network: str, weights: str) -> str:
    """The Fréchet distance between clips on the features of a video network.

    Example:
        >>> video_frechet("I3D", "0123456789abcdef"), video_frechet("Video", "0123456789abcdef")
        ('FVD', 'FD-Video-01234567')
    """
    return "FVD" if network == I3D else f"FD-{network}-{weights[:8]}"


def video_flag(network: str, weights: str, resize: str) -> str:
    """What every distance between clips has to say of its network: papers differ in both.

    Example:
        >>> video_flag("I3D", "0123456789abcdef", "inside the file")
        'weights 01234567, taken for the I3D of Kinetics-400; resize inside the file'
    """
    taken = ", taken for the I3D of Kinetics-400" if network == I3D else ""
    return f"weights {weights[:8]}{taken}; resize {resize}"


def frames_flag(count: int, frames: int | None, one_each: bool = False) -> str | None:
    """What a metric of pictures has to say of clips, whose frames are pictures to it, or None.

    Example:
        >>> frames_flag(22, 16)
        'frames of clips, 22 x 16'
        >>> frames_flag(22, 16, one_each=True)
        'one frame of each clip'
        >>> frames_flag(22, None) is None
        True
    """
    if frames is None:
        return None
    return "one frame of each clip" if one_each else f"frames of clips, {count:,} x {frames}"


def rank_flag(count: int, width: int) -> str | None:
    """What to say of a Fréchet distance whose covariance has no full rank, or None.

    n rows give a covariance of rank n - 1 at most. With fewer than width + 1 the distance is
    defined, but it is far too large, by an amount that depends on n.

    Example:
        >>> rank_flag(500, 2048)
        'n = 500 <= 2,048 features: rank-deficient'
        >>> rank_flag(50_000, 2048) is None
        True
    """
    return f"n = {count:,} <= {width:,} features: rank-deficient" if count <= width else None


def split_flag(count: int, splits: int, classes: int) -> str | None:
    """What to say of an Inception score whose splits cannot show every class, or None.

    The score is bounded by the number of samples in a split, and far too small with few of them.

    Example:
        >>> split_flag(500, splits=10, classes=1008)
        '50 samples a split < 1,008 classes: biased low'
    """
    size = count // splits
    return f"{size:,} samples a split < {classes:,} classes: biased low" if size < classes else None


def flagged(name: str, *flags: str | None) -> str:
    """A name with its flags: the name alone where there is none.

    Example:
        >>> flagged("FID", rank_flag(500, 2048))
        'FID [n = 500 <= 2,048 features: rank-deficient]'
        >>> flagged("FID", None)
        'FID'
    """
    raised = [flag for flag in flags if flag]
    return f"{name} [{'; '.join(raised)}]" if raised else name
