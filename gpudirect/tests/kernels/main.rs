//! The kernels, run: on the host's processor where there is a C++ compiler, and
//! on a device where there is one.

#![allow(clippy::unwrap_used, reason = "a test ends there, and says where")]

mod build;
mod driver;
mod moves;
mod sums;

use std::sync::{Arc, OnceLock};

use terrace_gpudirect::kernels::{Cuda, KernelError, KernelQueue, OnHost};

/// Everything that runs kernels here. Says loudly what is missing.
fn queues() -> Vec<Arc<dyn KernelQueue>> {
    static QUEUES: OnceLock<Vec<Arc<dyn KernelQueue>>> = OnceLock::new();
    let open = || {
        let mut found: Vec<Arc<dyn KernelQueue>> = Vec::new();
        match OnHost::build() {
            Ok(queue) => found.push(Arc::new(queue)),
            Err(KernelError::NoCompiler { detail }) => eprintln!("SKIPPED on the host: {detail}"),
            Err(error) => panic!("{error}"),
        }
        match Cuda::open(0) {
            Ok(queue) => found.push(Arc::new(queue)),
            Err(KernelError::NoDevice { detail }) => eprintln!("SKIPPED on a device: {detail}"),
            Err(error) => panic!("{error}"),
        }
        for queue in &found {
            eprintln!("runs on: {}", queue.describe());
        }
        found
    };
    QUEUES.get_or_init(open).clone()
}
