// A client as pages of the earlier service have it. It knows nothing of resuming, of sub-protocols and of what a message of today
// holds beside type and payload; it puts its token into the URL as it came, and takes each event's type from the payload.
function connectChatSocket({ baseUrl, companyId, agentId, token, apiKey, onChat, onMessage, onContact, onAgent, onReady, onError, onClose }) {
  const ws = new WebSocket(`${baseUrl}/ws/${companyId}/${agentId}?token=${token}&x-api-key=${apiKey}`);

  ws.onmessage = (event) => {
    const msg = JSON.parse(event.data);
    if (msg.type === 'ready') {
      ws.send(JSON.stringify({ type: 'ready' }));
      onReady();
      return;
    }
    if (msg.type === 'error') {
      onError(msg.payload);
      return;
    }
    if (msg.type !== 'event') {
      return;
    }
    switch (msg.payload.event_type) {
      case 'chat':
        onChat(msg.payload.row_data);
        break;
      case 'message':
        onMessage(msg.payload.chat_id, msg.payload.row_data);
        break;
      case 'contact':
        onContact(msg.payload.row_data);
        break;
      case 'agent':
        onAgent(msg.payload.row_data);
        break;
      default:
        onError({ code: 'UnknownEvent', message: event.data });
    }
  };

  ws.onclose = (event) => onClose(event.code, event.reason);

  return {
    selectChat(chatId) {
      ws.send(JSON.stringify({ type: 'select_chat', chat_id: chatId }));
    },
    close() {
      ws.close(1000);
    },
  };
}
