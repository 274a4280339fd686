//! Decides how many prefill and decode workers there should be, and runs them.
//!
//! [`size::decide`] turns what workers and routers report into a wanted number
//! of workers, with its reason; [`fleet::Fleet`] turns that number into starts
//! and stops of named workers, restarting the dead ones with backoff. Both are
//! pure. [`local`] performs the starts and stops as processes of this machine,
//! and [`service`] ties them to the daemon's signal stream.

pub mod config;
pub mod fleet;
pub mod local;
mod metrics;
pub mod process;
pub mod service;
pub mod size;
