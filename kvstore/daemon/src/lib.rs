//! `terraced`: the daemon of one node. It owns all memory that holds KV blocks,
//! and drives the core with media, the lane and gRPC.
//!
//! The core decides; this crate performs. [`Engine`] is the shell around the
//! core, [`Service`] answers requests the same way on every transport, and
//! [`Daemon`] puts them together.

mod config;
mod connections;
mod convert;
mod daemon;
mod engine;
mod events;
mod grpc;
mod hbm;
mod health;
mod http;
mod lane;
mod metrics;
mod rates;
mod restore;
mod service;
mod session;
mod signals;
mod spaces;
mod status;
mod tenant;
mod upkeep;

pub use config::{Config, ConfigError, Device, Edges, HbmDevice, Tenant, UseGds};
pub use daemon::{Daemon, StartError};
pub use engine::Engine;
pub use hbm::OpenDevice;
pub use service::Service;
