//! The kernels, run: on the host's processor where there is a C++ compiler, and
//! on a device where there is one.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod build;
mod driver;
mod moves;
mod sums;

use std::sync::{Arc, OnceLock};

use terrace_gpudirect::kernels::{KernelQueue, every_queue};

fn queues() -> Vec<Arc<dyn KernelQueue>> {
    static QUEUES: OnceLock<Vec<Arc<dyn KernelQueue>>> = OnceLock::new();
    QUEUES.get_or_init(|| every_queue().unwrap()).clone()
}
