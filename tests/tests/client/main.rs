//! The client library against the real daemon, over both transports.
#![allow(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

mod daemon;
mod device;
mod device_wire;
mod examples;
mod get;
mod grpc;
mod lane;
mod life;
mod put;
