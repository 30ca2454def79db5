"""Off-screen rendering on machines without a screen or a GPU.

MuJoCo reads MUJOCO_GL once, when it is imported, and its default needs a window system. So the rest of this
package imports MuJoCo from here, after the choice is made.
"""

import atexit
import ctypes
import functools
import os
import sys
import threading


def egl_has_device() -> bool:
    """True when libEGL loads and lists at least one device (a GPU, or Mesa's software renderer)."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    address = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    if not address:
        return False
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))(address)
    num_devices = ctypes.c_int(0)
    return bool(query(0, None, ctypes.byref(num_devices))) and num_devices.value > 0


def osmesa_loads() -> bool:
    for name in ("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def choose_backend() -> None:
    """Set MUJOCO_GL to egl, else osmesa, unless the user has set it. Must run before mujoco is imported.

    Raises ImportError naming the system packages when neither library is there. Other systems than Linux
    keep MuJoCo's own choice, which needs no screen there.
    """
    if os.environ.get("MUJOCO_GL") or "mujoco" in sys.modules or not sys.platform.startswith("linux"):
        return
    if egl_has_device():
        os.environ["MUJOCO_GL"] = "egl"
    elif osmesa_loads():
        os.environ["MUJOCO_GL"] = "osmesa"
    else:
        raise ImportError(
            "MuJoCo needs EGL or OSMesa to render without a screen, and found neither: install one, "
            "e.g. `apt-get install libegl1` (with libgl1-mesa-dri) or `apt-get install libosmesa6`"
        )


choose_backend()

import cv2  # noqa: E402
import mujoco  # noqa: E402
import numpy as np  # noqa: E402

# Frames are drawn at twice their size and box-filtered. On a software renderer this costs a third of what
# multisampling does, and without either a block a few pixels wide loses its shape.
SUPERSAMPLING = 2


class FrameRenderer:
    """Renders a camera to (image_size, image_size, 3) uint8 frames, without shadows and reflections.

    One renderer serves every model with the same meshes, textures and sizes: what differs between environments
    (poses, colours, what is shown) is read anew for each frame. The model must be compiled with offsamples 0,
    shadowsize 0 and an off-screen buffer of SUPERSAMPLING * image_size pixels (arena.py does): on a software
    renderer that is worth a factor of ten and more.
    """

    def __init__(self, model: mujoco.MjModel, image_size: int, camera: str = "top") -> None:
        self.image_size = image_size
        buffer_size = SUPERSAMPLING * image_size
        self.renderer = mujoco.Renderer(model, buffer_size, buffer_size, max_geom=256)
        flags = self.renderer.scene.flags
        for flag in (
            mujoco.mjtRndFlag.mjRND_SHADOW,
            mujoco.mjtRndFlag.mjRND_REFLECTION,
            mujoco.mjtRndFlag.mjRND_SKYBOX,
            mujoco.mjtRndFlag.mjRND_HAZE,
        ):
            flags[flag] = 0
        self.options = mujoco.MjvOption()
        self.camera = mujoco.MjvCamera()
        self.camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self.camera.fixedcamid = model.camera(camera).id
        # MuJoCo registers EGL's shutdown when the first context is made. Exit functions run last in, first out:
        # registered here, this one frees the context before that shutdown, and not after it with a traceback.
        atexit.register(self.renderer.close)

    def render(self, model: mujoco.MjModel, data: mujoco.MjData) -> np.ndarray:
        """The frame of `data` as it stands, (image_size, image_size, 3) uint8."""
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(model, data, self.options, None, self.camera, everything, self.renderer.scene)
        return cv2.resize(self.renderer.render(), (self.image_size,) * 2, interpolation=cv2.INTER_AREA)


@functools.cache
def _renderer_of_thread(look: str, image_size: int, thread: int) -> FrameRenderer:
    return FrameRenderer(mujoco.MjModel.from_xml_string(look), image_size)


def shared_renderer(look: str, image_size: int) -> FrameRenderer:
    """The calling thread's renderer for models compiled from the MJCF text `look`.

    Shared, since a graphics context costs a quarter of a second on a software renderer; one a thread, since a
    context belongs to the thread that uses it.
    """
    return _renderer_of_thread(look, image_size, threading.get_ident())
