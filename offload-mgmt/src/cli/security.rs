//! `outboard security-group ...`

use proto::v1::{
    ChangeSecurityGroupRequest, CreateSecurityGroupRequest, DeleteSecurityGroupRequest,
    ListSecurityGroupsRequest, SecurityGroupRule, SecurityGroupSpec, TrafficDirection,
};

use super::args::{Cli, Rules, SecurityGroupCommand};
use super::client::Client;
use super::failure::Failure;
use super::view::security::SecurityGroup;
use super::{QUICK, removed, render};

/// Runs one of these commands.
pub(super) async fn run(cli: &Cli, client: &Client, command: &SecurityGroupCommand) -> Result<(), Failure> {
    let mut api = client.api();
    match command {
        SecurityGroupCommand::Create { name, rules, no_egress, card } => {
            let request = CreateSecurityGroupRequest {
                spec: Some(SecurityGroupSpec { id: name.clone(), rules: rules_of(rules)? }),
                no_egress: *no_egress,
                card: card.clone().unwrap_or_default(),
            };
            let doing = format!("Creating {name}");
            let group = client.wait(&doing, QUICK, api.create_security_group(request)).await?;
            let group = SecurityGroup::from(group);
            render::print(cli.output, &group, || format!("{}\n", group.id))
        }
        SecurityGroupCommand::Ls => {
            let groups = list(client).await?;
            render::print(cli.output, &groups, || render::security_groups(&groups))
        }
        SecurityGroupCommand::Show { name } => {
            let group = list(client).await?.into_iter().find(|g| g.id == *name);
            let group = group.ok_or_else(|| not_found(name))?;
            render::print(cli.output, &group, || render::security_group(&group))
        }
        SecurityGroupCommand::Allow { name, rules } => {
            let add = some(rules_of(rules)?)?;
            change(cli, client, ChangeSecurityGroupRequest { id: name.clone(), add, remove: vec![] }).await
        }
        SecurityGroupCommand::Revoke { name, rules } => {
            let remove = some(rules_of(rules)?)?;
            change(cli, client, ChangeSecurityGroupRequest { id: name.clone(), add: vec![], remove }).await
        }
        SecurityGroupCommand::Rm { name } => {
            let request = DeleteSecurityGroupRequest { id: name.clone() };
            client.wait(&format!("Removing {name}"), QUICK, api.delete_security_group(request)).await?;
            removed(cli, name)
        }
    }
}

async fn list(client: &Client) -> Result<Vec<SecurityGroup>, Failure> {
    let mut api = client.api();
    let asked = api.list_security_groups(ListSecurityGroupsRequest {});
    let answer = client.wait("Asking the controller", QUICK, asked).await?;
    Ok(answer.groups.into_iter().map(SecurityGroup::from).collect())
}

async fn change(cli: &Cli, client: &Client, request: ChangeSecurityGroupRequest) -> Result<(), Failure> {
    let mut api = client.api();
    let doing = format!("Changing {}", request.id);
    let group = client.wait(&doing, QUICK, api.change_security_group(request)).await?;
    let group = SecurityGroup::from(group);
    render::print(cli.output, &group, || render::security_group(&group))
}

fn rules_of(rules: &Rules) -> Result<Vec<SecurityGroupRule>, Failure> {
    let mut all = Vec::new();
    for (options, direction) in
        [(&rules.ingress, TrafficDirection::Ingress), (&rules.egress, TrafficDirection::Egress)]
    {
        for option in options {
            let rules = option.rules(direction);
            all.extend(
                rules.map_err(|e| Failure::Local(e, "see: outboard security-group create --help".into()))?,
            );
        }
    }
    Ok(all)
}

fn some(rules: Vec<SecurityGroupRule>) -> Result<Vec<SecurityGroupRule>, Failure> {
    if rules.is_empty() {
        let hint = "name one with --ingress or --egress, like --ingress tcp,ports=443";
        return Err(Failure::Local("there is no rule".to_owned(), hint.to_owned()));
    }
    Ok(rules)
}

fn not_found(name: &str) -> Failure {
    proto::error::Error::new(
        tonic::Code::NotFound,
        proto::error::ErrorReason::SecurityGroupNotFound,
        format!("there is no security group {name}"),
    )
    .remedy("see which there are with: outboard security-group ls")
    .into()
}
