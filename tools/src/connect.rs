//! Finds the daemon and talks to its AdminService.

use std::time::Duration;

use anyhow::{Context, anyhow};
use terrace_proto::v1::admin_service_client::AdminServiceClient;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

use crate::cli::Target;
use crate::home::{self, Running};

/// Longest wait for a connection.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);

/// The daemon's address: `--endpoint`, or what `terrace up` wrote into `--home`.
///
/// # Errors
/// When neither leads to a daemon.
pub(crate) fn endpoint(target: &Target) -> anyhow::Result<String> {
    if let Some(endpoint) = &target.endpoint {
        let full = if endpoint.contains("://") { endpoint.clone() } else { format!("http://{endpoint}") };
        return Ok(full);
    }
    Ok(running(target)?.grpc)
}

/// What the running `terrace up` of `--home` says about itself.
///
/// # Errors
/// When there is none.
pub(crate) fn running(target: &Target) -> anyhow::Result<Running> {
    let dir = target.home.clone().unwrap_or_else(|| home::DEFAULT.into());
    Running::read(&dir)
}

/// The router's URL: the one that was named, or that of the running `terrace up` of `--home`.
///
/// # Errors
/// When neither is known.
pub(crate) fn router(target: &Target, named: Option<&str>) -> anyhow::Result<String> {
    match named {
        Some(router) => Ok(router.to_owned()),
        None => Ok(running(target).context("no router is known: name one by --router URL")?.url),
    }
}

/// A connection to the AdminService.
///
/// # Errors
/// When nothing answers; says what to do.
pub(crate) async fn admin(target: &Target) -> anyhow::Result<AdminServiceClient<Channel>> {
    let address = endpoint(target)?;
    let channel = Endpoint::from_shared(address.clone())
        .with_context(|| format!("{address} is no address; write it as http://127.0.0.1:7070"))?
        .connect_timeout(CONNECT_TIME_MAX)
        .connect()
        .await
        .map_err(|_| anyhow!("no daemon answers at {address}; is `terrace up` or `terraced` running?"))?;
    Ok(AdminServiceClient::new(channel).max_decoding_message_size(terrace_proto::MESSAGE_BYTES_MAX))
}

/// A refused call as one line.
pub(crate) fn refused(status: tonic::Status) -> anyhow::Error {
    match status.code() {
        Code::Unavailable => anyhow!("the daemon went away; try again ({})", status.message()),
        Code::Unimplemented => anyhow!("this daemon does not know that request; is it of another version?"),
        code => anyhow!("refused: {} ({code:?})", status.message()),
    }
}
