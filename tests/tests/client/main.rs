//! The client library against the real daemon, over both transports.

mod daemon;
mod grpc;
mod lane;
mod life;
