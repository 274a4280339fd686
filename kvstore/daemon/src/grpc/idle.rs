//! Streams that stand still are ended: they hold frames, and a part of the streams that there may be.

use std::time::Duration;

use tokio::time::timeout;
use tonic::Code;

use crate::convert::CallError;

/// What the peer does, if it does it in time. Cancel-safe where `step` is.
///
/// # Errors
/// The peer stood still.
pub(super) async fn in_time<T>(idle: Duration, step: impl Future<Output = T>) -> Result<T, CallError> {
    timeout(idle, step).await.map_err(|_| {
        let text = format!(
            "the stream stood still for {} ms, `limits.stream_idle_ms`, and was ended; ask for the rest again",
            idle.as_millis()
        );
        CallError::new(Code::DeadlineExceeded, text)
    })
}
