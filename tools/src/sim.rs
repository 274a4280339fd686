//! `sim`: replays recorded traffic against the code that decides in a real node.
//!
//! The core of `terraced` runs unchanged; memory, devices, links and time are
//! simulated, so that a node can be sized before it is bought.

pub(crate) mod node;
pub(crate) mod options;
pub(crate) mod parallel;
mod plot;
pub(crate) mod profile;
pub(crate) mod reference;
pub(crate) mod report;
pub(crate) mod route;
pub(crate) mod serve;
pub(crate) mod size;
pub(crate) mod store;
pub(crate) mod trace;
