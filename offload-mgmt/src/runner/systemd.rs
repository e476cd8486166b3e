//! Hypervisors as instances of the unit `outboard-vm@.service`, started over D-Bus: systemd gives them their user, their
//! limits and their journal, and they depend on the controller for nothing.

use std::path::PathBuf;
use std::time::Duration;

use proto::error::{Error, ErrorReason};
use tokio_stream::StreamExt;
use tonic::Code;
use zbus::Connection;
use zbus_systemd::systemd1::{ManagerProxy, ServiceProxy, UnitProxy};

use super::{Exit, Liveness, Runner};

/// Where the unit makes its runtime directories (RuntimeDirectory=outboard-vm/%i).
const RUNTIME_DIR: &str = "/run/outboard-vm";
/// How long systemd may take to start or stop a unit.
const JOB_DEADLINE: Duration = Duration::from_secs(30);
/// How long systemd may take to answer a question.
const CALL_DEADLINE: Duration = Duration::from_secs(5);

/// The runner.
#[derive(Debug, Default)]
pub struct SystemdRunner {
    // Opened when first needed and again when it broke.
    bus: tokio::sync::Mutex<Option<Connection>>,
}

/// What is done to a unit.
#[derive(Debug, Clone, Copy)]
enum Job {
    Start,
    Stop,
}

impl SystemdRunner {
    async fn manager(&self) -> zbus::Result<ManagerProxy<'static>> {
        let mut bus = self.bus.lock().await;
        if let Some(connection) = bus.as_ref()
            && ping(connection).await.is_ok()
        {
            return ManagerProxy::new(connection).await;
        }
        let connection = Connection::system().await?;
        let manager = ManagerProxy::new(&connection).await?;
        // Without a subscriber systemd does not announce that a job is done.
        manager.subscribe().await?;
        *bus = Some(connection);
        Ok(manager)
    }

    /// Queues a job and waits until it is done; its result, "done" if all went well.
    async fn job(&self, vm: &str, job: Job) -> zbus::Result<String> {
        let manager = self.manager().await?;
        let mut removed = manager.receive_job_removed().await?;
        let (name, mode) = (unit(vm), "replace".to_owned());
        let path = match job {
            Job::Start => manager.start_unit(name, mode).await?,
            Job::Stop => manager.stop_unit(name, mode).await?,
        };
        while let Some(signal) = removed.next().await {
            let args = signal.args()?;
            if args.job == path {
                return Ok(args.result.clone());
            }
        }
        Err(zbus::Error::Failure("the connection to systemd ended".into()))
    }

    async fn state(&self, vm: &str) -> zbus::Result<(String, Exit)> {
        let manager = self.manager().await?;
        let path = manager.load_unit(unit(vm)).await?;
        let connection = manager.inner().connection().clone();
        let active = UnitProxy::new(&connection, path.clone()).await?.active_state().await?;
        let service = ServiceProxy::new(&connection, path).await?;
        if service.exec_main_start_timestamp().await? == 0 {
            // systemd has forgotten the unit, which it does only with those that ended well (CollectMode=inactive).
            return Ok((active, Exit { clean: true, ..Exit::default() }));
        }
        let (result, status) = (service.result().await?, service.exec_main_status().await?);
        let how = match result.as_str() {
            "success" => "ended".to_owned(),
            "exit-code" => format!("exited with status {status}"),
            "signal" | "core-dump" => format!("was ended by signal {status}"),
            other => format!("ended: systemd says {other}"),
        };
        Ok((active, Exit { clean: result == "success", how, last_words: String::new() }))
    }
}

#[tonic::async_trait]
impl Runner for SystemdRunner {
    fn control_socket(&self, vm: &str) -> PathBuf {
        PathBuf::from(RUNTIME_DIR).join(vm).join("control.sock")
    }

    fn log_hint(&self, vm: &str) -> String {
        format!("see journalctl -u {}", unit(vm))
    }

    async fn start(&self, vm: &str) -> Result<(), Error> {
        match tokio::time::timeout(JOB_DEADLINE, self.job(vm, Job::Start)).await {
            Ok(Ok(result)) if result == "done" => Ok(()),
            Ok(Ok(result)) => Err(failed(vm, "cannot be started", &format!("systemd says {result}"))),
            Ok(Err(e)) => Err(failed(vm, "cannot be started", &e.to_string())),
            Err(_) => Err(failed(vm, "cannot be started", "systemd does not finish starting it")),
        }
    }

    async fn liveness(&self, vm: &str) -> Liveness {
        match tokio::time::timeout(CALL_DEADLINE, self.state(vm)).await {
            Ok(Ok((active, exit))) if active == "inactive" || active == "failed" => Liveness::Ended(exit),
            Ok(Ok(_)) => Liveness::Alive,
            // Unknown; the process's own socket decides.
            Ok(Err(e)) => {
                tracing::warn!(vm, "systemd does not say whether {} runs: {e}", unit(vm));
                Liveness::Alive
            }
            Err(_) => Liveness::Alive,
        }
    }

    async fn stop(&self, vm: &str, grace: Duration) -> Result<(), Error> {
        // A stop job sends SIGTERM at once, on which a hypervisor ends its VM: first give it its time.
        let gone = async {
            let mut pause = Duration::from_millis(5);
            while self.liveness(vm).await == Liveness::Alive {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(200));
            }
        };
        let _ = tokio::time::timeout(grace, gone).await;
        match tokio::time::timeout(JOB_DEADLINE, self.job(vm, Job::Stop)).await {
            Ok(Ok(_)) => Ok(()),
            // No such unit is loaded, so nothing runs.
            Ok(Err(zbus::Error::MethodError(name, _, _)))
                if name.as_str() == "org.freedesktop.systemd1.NoSuchUnit" =>
            {
                Ok(())
            }
            Ok(Err(e)) => Err(failed(vm, "cannot be stopped", &e.to_string())),
            Err(_) => Err(failed(vm, "cannot be stopped", "systemd does not finish stopping it")),
        }
    }

    async fn clean(&self, vm: &str) {
        let reset = async {
            // Refused when the unit has not failed.
            if let Ok(manager) = self.manager().await {
                let _ = manager.reset_failed_unit(unit(vm)).await;
            }
        };
        let _ = tokio::time::timeout(CALL_DEADLINE, reset).await;
    }
}

/// Whether systemd still answers on this connection.
async fn ping(connection: &Connection) -> zbus::Result<()> {
    let (name, path, peer) =
        ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.DBus.Peer");
    connection.call_method(Some(name), path, Some(peer), "Ping", &()).await.map(|_| ())
}

fn unit(vm: &str) -> String {
    format!("outboard-vm@{vm}.service")
}

fn failed(vm: &str, what: &str, why: &str) -> Error {
    Error::new(Code::Internal, ErrorReason::Host, format!("{} {what}: {why}", unit(vm)))
        .resource(unit(vm))
        .remedy(format!("see systemctl status {0} and journalctl -u {0}", unit(vm)))
}
